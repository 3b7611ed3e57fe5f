from safegene.cli import main

raise SystemExit(main())
