"""The cases: a module for each family, a line for each row, with its reason. harness/problem/families.py reads them."""
