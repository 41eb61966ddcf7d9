"""Sweeps: methods x budgets x contexts x tasks from one YAML file into one folder of result rows, goes on where it ended.

document.py  YAML -> values with the path that leads to each
plan.py      values -> a frozen plan -> cells
tasks.py     the tasks' options, and how each runs
store.py     the result folder: stamp, rows, claims, failures
evaluator.py the models of a plan; runs cells
run.py       claim, run, write: one process
processes.py the same in several processes
remote.py    the same as tasks of a Ray cluster
"""
