"""One registration each. Importing this package registers what this machine can run."""

from . import eager

eager.register()
