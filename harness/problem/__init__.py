"""Problems, Cases, the grammar of descriptors, the families of cases/. Standard library only.

Public: `Problem`, `Case` and `DescriptorError` (case.py); `families` and `rows` (families.py), and `sweep` and
`pairwise`, with which cases/ makes rows; `inexact` (exactness.py); a descriptor in words (words.py).
"""
