"""The routes, one module a protocol or purpose, each with an APIRouter."""
