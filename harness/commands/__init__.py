"""One module for each command of the command line, named as the command.

Public: `register(add)` of every module, which declares the command's arguments; `cli.COMMANDS` lists the modules.
The command line imports all of them at every start, so a slow import stands in the function that needs it.
"""

from harness.problem.case import Case, DescriptorError
from harness.scenarios import check_scenario


def parse_case(descriptor: str) -> Case:
    """Parse a descriptor from the command line. DescriptorError names the command that lists descriptors."""
    try:
        return check_scenario(Case.parse(descriptor))
    except DescriptorError as error:
        raise DescriptorError(f"{error}; those in use: python3 -m harness list --why") from error
