"""The errors a user can meet: each says what was expected, what was found, why it matters and what to do."""


class MinecubeError(Exception):
    """Anything that went wrong in a way the user can act on; `exit_code` is what the command line returns."""

    exit_code = 2


class CatalogError(MinecubeError):
    """A site, source, recipe or model is unknown, malformed or contradicts another."""


class SceneError(MinecubeError):
    """A search found nothing usable, or an item cannot be normalised."""


class UnansweredError(SceneError):
    """A source of scenes does not answer, or its answer is broken."""

    exit_code = 1


class ReadError(MinecubeError):
    """Pixels that were listed could not be read: the site-year is not committed."""

    exit_code = 1


class LostReadError(ReadError):
    """A file that is listed and allowed could not be read."""


class GoneError(LostReadError):
    """A file that no later read brings back: it is missing or broken. `href` names it."""

    def __init__(self, message: str, href: str = "") -> None:
        super().__init__(message)
        self.href = href


class WorkerError(MinecubeError):
    """A worker or the scheduler of a cluster died. Committed site-years are safe."""

    exit_code = 1


class CubeError(MinecubeError):
    """A store is not ours, was made by another recipe or grid, or cannot be written."""


class BusyError(CubeError):
    """Another run is writing the same part of the store."""

    exit_code = 1


class StaleError(CubeError):
    """A site-year is committed with another build than this run would make."""


class LabelError(MinecubeError):
    """Polygons that cannot be placed on the grid: no CRS, empty, elsewhere."""


class ReleaseError(MinecubeError):
    """The published archive cannot be read, or is not laid out as it was published."""


class UnreadArchiveError(ReleaseError):
    """The server of an archive does not answer, or its answer is broken."""

    exit_code = 1


class ModelError(MinecubeError):
    """A model does not fit the cube, or its file is not one of ours."""


class UnreadWeightsError(ModelError):
    """Weights cannot be downloaded."""

    exit_code = 1
