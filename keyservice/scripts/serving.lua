-- Say which keys a region serves. KEYS: serving, epoch. ARGV: number, nonce, then kids. Each is served since it was first
-- said in this epoch: after a failover a server may know less than the one before it. A time in the future is none: the
-- server's clock was set back since. Returns {the server's time (ms)}.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end

local now_ms = server_ms()
if redis.call('HGET', KEYS[1], 'nonce') ~= ARGV[2] then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'nonce', ARGV[2])
end
local served = {nonce = true}
for i = 3, #ARGV do
  served['kid:' .. ARGV[i]] = true
  local since = redis.call('HGET', KEYS[1], 'kid:' .. ARGV[i])
  if not since or (tonumber(since) or math.huge) > tonumber(now_ms) then
    redis.call('HSET', KEYS[1], 'kid:' .. ARGV[i], now_ms)
  end
end
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  if not served[name] then
    redis.call('HDEL', KEYS[1], name)
  end
end
return {now_ms}
