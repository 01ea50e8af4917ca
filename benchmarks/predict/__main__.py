from benchmarks.predict.predictions import main

main()
