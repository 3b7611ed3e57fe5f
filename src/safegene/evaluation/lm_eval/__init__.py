"""SafetyEval's single-turn suites as lm-eval tasks: the two YAML files here, their data and their scoring in `tasks`."""
