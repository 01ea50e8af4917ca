import sys

from benchmarks.predict.predictions.predictions import main

sys.exit(main())
