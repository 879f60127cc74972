"""What the kernels cost: listed, compiled and read, verified, measured, compared; see bench/README.md."""
