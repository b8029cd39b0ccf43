"""A package, so that these tests are meant by its name: opensimplex, which Crafter needs, installs another `tests`."""
