"""One module per question: a config and a docstring with its exact command. Results stand beside them in results/."""
