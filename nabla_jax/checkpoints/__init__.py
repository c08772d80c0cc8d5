"""Files to parameter trees and back: safetensors streaming, pipeline folders, adapters, run state."""
