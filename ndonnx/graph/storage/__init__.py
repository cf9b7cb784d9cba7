"""What only the file has, not the graph: weights beside it, sparse tensors, maps, and how its opsets are spelled."""
