"""The maths of GPTQ: from a weight matrix and its inputs' Hessian to codes, scales and zero points."""
