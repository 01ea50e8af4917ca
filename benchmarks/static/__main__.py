import sys

from benchmarks.static.machine_code.machine_code import main

sys.exit(main())
