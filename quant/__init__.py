"""GPTQ quantisation: algorithm, kernels, on-disk formats and reports. Imports none of our other packages."""
