"""Speed: what a call does, counted exactly; what it takes; and which commit is to blame."""
