"""Speed: what a call does, counted exactly (structure, compiled), what it takes (clock), and who is to blame (compare, bisect)."""
