"""The measuring room: who can run a case, whether it is right, how long it takes, what it needs.

``grid`` names cases, ``providers`` runs them, ``check`` holds them against float64, ``timing`` and
``memory`` measure, ``runner`` and ``comparison`` put these together, ``report`` and ``plot`` show.
"""
