"""`python -m k8sdiag`."""

import sys

from k8sdiag.cli import main

sys.exit(main())
