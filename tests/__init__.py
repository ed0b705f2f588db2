"""The tests mirror ref/: ref/scale/microbatch.py is tested by tests/scale/test_microbatch.py. tools.py is shared."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # test_claims_*.py import claims.py by its bare name
