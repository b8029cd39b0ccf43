"""Sweep files: `dreamer4 sweep NAME`. What they may hold: launch/sweep_file.py."""
