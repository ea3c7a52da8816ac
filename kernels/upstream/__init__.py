"""Adapters to implementations that others ship, one small file each. They import what they adapt when it is used."""
