"""`python -m captum_ext.cli` is `captum-ext`."""

import sys

from captum_ext.cli import main

sys.exit(main())
