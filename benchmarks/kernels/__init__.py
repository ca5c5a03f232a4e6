"""The language-side ops of uae_kernels beside their rivals."""
