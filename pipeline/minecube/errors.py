"""The errors a user can meet. Messages give the expected and found state, effect and remedy."""


class MinecubeError(Exception):
    """Any error that the user can act on. `exit_code` is the command line's exit status."""

    exit_code = 2


class CatalogError(MinecubeError):
    """A site, source, recipe or model is unknown, malformed or contradicts another."""


class PlaceError(MinecubeError):
    """The name of a file, folder or object store is wrong, or nothing is there."""


class SceneError(MinecubeError):
    """A search found nothing usable, or an item cannot be normalised."""


class UnansweredError(SceneError):
    """A source of scenes does not answer, or its answer is broken."""

    exit_code = 1


class ReadError(MinecubeError):
    """Listed pixels could not be read, so the site-year is not committed."""

    exit_code = 1


class LostReadError(ReadError):
    """A listed and allowed file could not be read."""


class UnusableFileError(LostReadError):
    """A file is missing or broken, also for later reads. `href` names it."""

    def __init__(self, message: str, href: str = "") -> None:
        super().__init__(message)
        self.href = href


class WorkerError(MinecubeError):
    """A worker or the scheduler of a cluster died. Committed site-years are safe."""

    exit_code = 1


class UnguardedScriptError(WorkerError):
    """The user's script starts a run when a worker imports it, so no worker can start."""


class CubeError(MinecubeError):
    """A store is not of minecube, has another recipe or grid, or cannot be written."""


class BusyError(CubeError):
    """Another run is writing the same part of the store."""

    exit_code = 1


class StaleError(CubeError):
    """A site-year is committed with another build than this run would make."""


class LabelError(MinecubeError):
    """Polygons cannot be placed on the grid: without CRS, empty, or elsewhere."""


class ReleaseError(MinecubeError):
    """The published archive cannot be read, or has another layout than published."""


class UnreadArchiveError(ReleaseError):
    """The server of an archive does not answer, or its answer is broken."""

    exit_code = 1


class ModelError(MinecubeError):
    """A model does not fit the cube, or its file is not of minecube."""


class UnreadWeightsError(ModelError):
    """Weights cannot be downloaded."""

    exit_code = 1
