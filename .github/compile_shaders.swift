// Compiles a Metal source as the extension does at first use: swift compile_shaders.swift FILE
import Foundation
import Metal

let source = try String(contentsOfFile: CommandLine.arguments[1], encoding: .ascii)
guard let device = MTLCopyAllDevices().first else {
  print("no Metal device here: only the offline compiler has seen the source")
  exit(0)
}
let options = MTLCompileOptions()
let usesTensors = source.contains("<metal_tensor>")
options.languageVersion = usesTensors ? .version4_0 : .version3_1
if usesTensors && !device.supportsFamily(.metal4) {
  print("\(device.name) has no Metal 4: only the offline compiler has seen the source")
  exit(0)
}
let library = try device.makeLibrary(source: source, options: options)
print("\(device.name): \(library.functionNames.count) kernels")
