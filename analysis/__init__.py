"""What relevance means: vocabulary projection, plots and reports on top of :mod:`lenslrp`.

Imported as ``lenslrp.analysis``; the folder is named ``analysis`` at the top of the repository.
"""
