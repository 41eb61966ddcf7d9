"""The kernel benchmark: a table of cases as data, one module per op for inputs, checks, fewest bytes and peers."""
