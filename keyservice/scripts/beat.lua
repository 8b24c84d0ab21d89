-- Say that the log is alive and how far it goes. KEYS: beat, epoch, log. ARGV: number, nonce, interval (ms).
-- Returns {1 if written, 0 if a beat of this epoch is young enough; the server's time (ms)}.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end

local now_ms = server_ms()
local held = redis.call('HMGET', KEYS[1], 'nonce', 'n', 'at')
local n = '0'
if held[1] == ARGV[2] then
  local age_ms = tonumber(now_ms) - tonumber(held[3])
  if age_ms >= 0 and age_ms < 0.75 * tonumber(ARGV[3]) then
    return {0, now_ms}
  end
  n = string.format('%.0f', tonumber(held[2]) + 1)
end

local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)[1]
local keys_n = redis.call('HGET', KEYS[2], 'keys_n') or '0'
redis.call('HSET', KEYS[1], 'nonce', ARGV[2], 'n', n, 'at', now_ms, 'position', last and last[1] or ARGV[1] .. '-0',
  'generation', ARGV[1] .. '-' .. keys_n)
return {1, now_ms}
