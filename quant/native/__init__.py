"""The native kernels: C sources, built on first use, and what the rest of the product calls them by."""
