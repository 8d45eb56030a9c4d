#pragma once
#include <objc/NSObjCRuntime.h>
#include <objc/objc.h>
@protocol NSObject
- (Class)class;
@end
__attribute__((objc_root_class))
@interface NSObject<NSObject> {
  Class isa;
}
+ (id)alloc;
+ (id)new;
+ (Class)class;
- (id)init;
@end
