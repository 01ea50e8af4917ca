import sys

from benchmarks.gpu.run.run import main

sys.exit(main())
