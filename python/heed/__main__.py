"""`python -m heed`: what runs here, and why not."""

import sys

from .doctor import main

sys.exit(main())
