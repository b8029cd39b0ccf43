"""The launcher: one description of a run, rendered for a laptop, Cloud TPU, GKE or SkyPilot; sweeps of such runs."""
