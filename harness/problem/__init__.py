"""The question: a Problem, a Case, the grammar of its descriptor, the families of cases/. Standard library only.

case.py has the grammar; families.py reads cases/; words.py describes a case to a reader.
"""
