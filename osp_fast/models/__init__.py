"""The networks: mathematics only, over the operations in `osp_fast.kernels`."""
