"""The one place where commands of the clouds' tools are run, or, with dry_run, printed instead.

Nothing secret passes through here: the tools hold their own credentials, and no environment is printed.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from dreamer4_jax.config import UserError

_INSTALL = {
    "gcloud": "install the Google Cloud CLI",
    "kubectl": "install it with 'gcloud components install kubectl'",
    "xpk": "install it with 'pip install xpk'",
    "sky": "install it with 'pip install skypilot[gcp]'",
}


class CommandFailed(UserError):
    """A tool ended with an error."""

    def __init__(self, argv: Sequence[str], code: int, stderr: str):
        lines = [line for line in stderr.strip().splitlines() if line.strip()]
        what = " ".join(argv[:5])  # the tool and its verb; the whole command may be a screenful
        super().__init__(f"{what}: exit code {code}" + "".join(f"\n  {line}" for line in lines[-10:]))
        self.code, self.stderr = code, stderr


def shell_text(argv: Sequence[str], stdin: str = "") -> str:
    """The command as it can be pasted into a shell."""
    if not stdin:
        return shlex.join(argv)
    end = "EOF"
    while end in stdin.splitlines():  # a line of the input must not end it
        end += "_"
    return f"{shlex.join(argv)} <<'{end}'\n{stdin.rstrip(chr(10))}\n{end}"


@dataclass(frozen=True)
class Cloud:
    """Runs commands; with `dry_run` prints them instead, and then takes them for successful."""

    dry_run: bool = False

    def output(self, argv: Sequence[str], *, stdin: str = "") -> str:
        """Runs a command and returns what it wrote to standard output.

        Raises:
            UserError: the tool is not installed.
            CommandFailed: it ended with an error; the message has the end of its standard error.
        """
        if self._printed(argv, stdin):
            return ""
        done = subprocess.run([self._tool(argv), *argv[1:]], input=stdin, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandFailed(argv, done.returncode, done.stderr)
        return done.stdout

    def show(self, argv: Sequence[str]) -> int:
        """Runs a command whose output goes to the terminal; returns its exit code."""
        if self._printed(argv):
            return 0
        return subprocess.run([self._tool(argv), *argv[1:]], stdin=subprocess.DEVNULL, check=False).returncode

    def check(self, argv: Sequence[str]) -> None:
        """Like `show`, but an error is raised as `CommandFailed`."""
        if code := self.show(argv):
            raise CommandFailed(argv, code, "")

    @staticmethod
    def require(*tools: str) -> None:
        """Raises `UserError` naming the first of the tools that is not installed."""
        for tool in tools:
            Cloud._tool([tool])

    def _printed(self, argv: Sequence[str], stdin: str = "") -> bool:
        if self.dry_run:
            print(shell_text(argv, stdin), flush=True)
        return self.dry_run

    @staticmethod
    def _tool(argv: Sequence[str]) -> str:
        path = shutil.which(argv[0])
        if path is None:
            raise UserError(f"{argv[0]}: not found; {_INSTALL.get(argv[0], 'install it')}, or see --dry-run")
        return path
