"""Several GPUs: ranks and their groups, sharded weights, what each rank holds of them, and whether all are well."""
