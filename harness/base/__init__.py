"""Nothing of MoE: errors for the user, text and tables, TOML, processes, time limits. Standard library only."""
