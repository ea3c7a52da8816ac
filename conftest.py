"""Makes `python3 -m pytest` in a checkout run the battery, with nothing installed but torch and pytest.

There is no pytest11 entry point on purpose: --device and --backend would then appear in every pytest run of that
environment, and collide with the options of other projects.
"""

pytest_plugins = ["harness.plugin"]
