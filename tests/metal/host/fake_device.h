// The only GPU.
#pragma once
#include <Metal/Metal.h>

@interface FakeDevice : NSObject <MTLDevice>
@end
