"""RunSpec: what is to be run and where, the same for every backend."""

import re
from dataclasses import dataclass, field

from dreamer4_jax.config import ConfigError

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")

INTERRUPTED = 42  # exit code of a run that saved and stopped (training.Interrupted)


def retryable(code: int) -> bool:
    """Whether a command that ended with this exit code should be started again, to resume.

    Interrupted runs are, and those killed by a signal: ``128 + signal`` for a shell, negative for Python; 255 is a lost
    ssh connection. Other codes are mistakes that would only be repeated.
    """
    return code == INTERRUPTED or code >= 128 or code < 0


@dataclass(frozen=True)
class RunSpec:
    """One run of one experiment. Everything is data: a backend turns it into commands, a manifest or processes.

    Attributes:
      name: of the run; lower-case letters, digits and hyphens, as cloud resources are named.
      experiment: a file of experiments/ or a preset.
      size: "smoke", "quick" or "full".
      seed: of data, training and evaluation.
      overrides: dotted config fields, ``("train.dynamics.steps=2000",)``.
      mesh: sizes of the mesh axes, ``"data=16,ctx=4"``; empty: as `dreamer4 run` chooses.
      output: directory of runs: a path, or ``gs://bucket/prefix``. The run directory is ``output/name``.
      accelerator: TPU type such as "v5litepod-16" or "v6e-64"; empty for local processes.
      slices: TPU slices; the mesh axis "replica" crosses them.
      spot: pre-emptible machines; recreated and resumed when they are taken away.
      retries: how often a run is started again after it was interrupted.
      project, zone: of the cloud; empty: as gcloud is configured.
      service_account: whose rights the machines have, on the bucket above all: an address (tpu), or the name of a
        Kubernetes service account that is bound to one (jobset); empty: the project's, or the namespace's.
      cluster: the GKE cluster's name, which xpk asks for; kubectl has its own current context.
      image: container image with the package installed (JobSet, xpk); empty where machines are set up from `archive`.
      archive: the code: a path of a local checkout, or ``gs://.../code.tar.gz``.
      processes, devices_per_process: of a local run.
      labels: put on what is created, to find it on the bill; a Kueue queue is named in one of them.
    """

    name: str
    experiment: str = "quickstart"
    size: str = "quick"
    seed: int = 0
    overrides: tuple[str, ...] = ()
    mesh: str = ""
    output: str = "runs"
    accelerator: str = ""
    slices: int = 1
    spot: bool = False
    retries: int = 10
    project: str = ""
    zone: str = ""
    service_account: str = ""
    cluster: str = ""
    image: str = ""
    archive: str = ""
    processes: int = 1
    devices_per_process: int = 1
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"name {self.name!r}: use at most 40 lower-case letters, digits and hyphens, beginning with a letter"
            )
        if self.size not in ("smoke", "quick", "full"):
            raise ConfigError(f"size {self.size!r}: choose one of 'smoke', 'quick', 'full'")
        for name in ("slices", "processes", "devices_per_process"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.retries < 0:
            raise ConfigError(f"retries = {self.retries}: must be at least 0")
        for item in self.overrides:
            if "=" not in item:
                raise ConfigError(f"override {item!r}: write it as field=value, e.g. dynamics.k_max=8")

    @property
    def directory(self) -> str:
        """The run directory."""
        return f"{self.output.rstrip('/')}/{self.name}"

    def command(self) -> list[str]:
        """The words of the command that every host runs. It resumes whatever the run directory holds already."""
        size = [] if self.size == "quick" else [f"--{self.size}"]
        mesh = ["--mesh", self.mesh] if self.mesh else []
        return [
            *("dreamer4", "run", self.experiment, *size, "--run", self.directory, "--resume"),
            *("--seed", str(self.seed), *mesh, *self.overrides),
        ]
