"""`python -m heed`: what runs here, and why not. `python -m heed serve`: `transformers serve`."""

import sys

if sys.argv[1:2] == ["serve"]:
    from . import transformers

    sys.exit(transformers.run_server(sys.argv[2:]))

from .doctor import main

sys.exit(main())
