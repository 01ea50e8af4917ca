import sys

from benchmarks.predict.predictions import main

sys.exit(main())
