"""Makes this folder the package of this name: torch-fidelity installs another one."""
