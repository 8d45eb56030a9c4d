// The part of Foundation that torch's MPS headers and encoder.mm use: declarations only, so that
// both compile where there is no macOS SDK.
#pragma once
#include <Availability.h>
#include <TargetConditionals.h>
#include <dispatch/dispatch.h>
#include <objc/NSObjCRuntime.h>
#include <objc/NSObject.h>
#include <objc/objc.h>
#include <os/availability.h>
#include <stdbool.h>
#include <stdint.h>

#ifndef NS_ENUM
#define NS_ENUM(type, name) \
  enum name : type name;    \
  enum name : type
#define NS_OPTIONS(type, name) NS_ENUM(type, name)
#endif

@class NSString, NSError;

@protocol NSCopying
- (id)copyWithZone:(struct _NSZone*)zone;
@end

@interface NSString : NSObject <NSCopying>
#ifdef ONEBIT_EMULATED_METAL
{
 @public
  char* text_;
}
#endif
+ (instancetype)stringWithUTF8String:(const char*)text;
@property(readonly) const char* UTF8String;
@end

@interface NSNumber : NSObject <NSCopying>
@end

@interface NSArray<__covariant T> : NSObject
@end

@interface NSDictionary<__covariant K, __covariant V> : NSObject
@end

@interface NSError : NSObject
@property(readonly, copy) NSString* localizedDescription;
@end

@interface NSProcessInfo : NSObject
@property(class, readonly) NSProcessInfo* processInfo;
@property(readonly, copy) NSString* operatingSystemVersionString;
@end
