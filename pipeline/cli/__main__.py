from eopd.pipeline.cli.main import main

main()
