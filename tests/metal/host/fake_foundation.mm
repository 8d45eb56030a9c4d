// What the real encoder.mm uses of Foundation.
#include <Foundation/Foundation.h>

#include <cstring>

extern "C" id onebit_new_instance(Class c);

@implementation NSObject
+ (id)alloc {
  return onebit_new_instance(self);
}
+ (id)new {
  return [[self alloc] init];
}
+ (Class)class {
  return self;
}
- (id)init {
  return self;
}
- (Class)class {
  return isa;
}
@end

@interface NSAutoreleasePool : NSObject
- (void)drain;
@end
@implementation NSAutoreleasePool
- (void)drain {
}
@end

@implementation NSString
+ (instancetype)stringWithUTF8String:(const char*)text {
  NSString* string = [NSString new];
  string->text_ = strdup(text);
  return string;
}
- (const char*)UTF8String {
  return text_;
}
- (id)copyWithZone:(struct _NSZone*)zone {
  return self;
}
@end

@implementation NSError
- (NSString*)localizedDescription {
  return [NSString stringWithUTF8String:"program_source:1:1: error: made to fail"];
}
@end

@implementation NSProcessInfo
+ (NSProcessInfo*)processInfo {
  return [NSProcessInfo new];
}
- (NSString*)operatingSystemVersionString {
  return [NSString stringWithUTF8String:"Version 0 (emulated)"];
}
@end
