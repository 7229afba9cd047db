"""The mathematics of quantization and sparsity."""
