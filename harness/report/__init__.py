"""Results files of any number of machines, merged (merge) and shown as one page (page)."""
