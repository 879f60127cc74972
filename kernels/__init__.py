"""Operations on tensors, each with its reference in plain PyTorch; import them by file."""
